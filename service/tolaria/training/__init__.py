"""The training itself: the lane that computes, the loop that steers it, the boundary between epochs."""
