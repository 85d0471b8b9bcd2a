"""What makes a run outlive its process: its journal, its checkpoints and the way back into it, seen from the loop."""
