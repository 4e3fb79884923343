"""A package, since a dependency (torch-fidelity) installs one of this name, which would be found instead."""
