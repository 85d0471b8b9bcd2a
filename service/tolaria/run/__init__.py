"""The deciding side of a run, on the event loop. Imports no torch; sees of the lane only `lane.messages`."""
