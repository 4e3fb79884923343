"""A photograph in, a result out: `mild.erasing.pipeline.MILDPipeline` and what it is given, and gives."""
