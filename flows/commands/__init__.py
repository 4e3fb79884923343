"""The commands of ``mild``, one file each; `flows.cli` has what they share with the shell."""
