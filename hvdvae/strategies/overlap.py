"""Where slices of vectors meet. Pure."""


def overlap(group: slice, part: slice) -> slice:
    """What lies in both; may be empty."""
    start = min(max(group.start, part.start), group.stop)
    return slice(start, max(start, min(group.stop, part.stop)))


def within(place: slice, whole: slice) -> slice:
    """The same, counted from the start of `whole`."""
    return slice(place.start - whole.start, place.stop - whole.start)
