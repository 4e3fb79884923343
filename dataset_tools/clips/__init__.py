"""Clips of a camera that stands still: the clean plate behind the people, where it is known, and who is in front.

`reading` takes samples of a clip, `alignment` lays those of one view over one another, `plate` finds what stood there
while nobody was in front, `people` finds who is, and `frames` chooses the pictures worth keeping.
"""
