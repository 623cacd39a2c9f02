"""What the programs of an emulated kernel of index logits take as their share of all visits."""


def recorded(runs):
    """A `share_of_program` that appends (block, skipped, visits) of each program to `runs`."""

    def recording(share_of_program):
        def shared(*arguments):
            share = share_of_program(*arguments)
            runs.append(tuple(int(getattr(share, n)) for n in ("block", "skipped", "visits")))
            return share

        return shared

    return recording
