"""Datasets for erasing people: sources, curation, masks, cues, compositing, shards, and the reader."""
