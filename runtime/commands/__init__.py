"""The commands of ``enturbo``, one module a group. They parse, call and print; what they call computes."""
