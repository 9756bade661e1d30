"""Whole runs against PEFT, against results it recorded (``pinned``), and the paper in NumPy."""
