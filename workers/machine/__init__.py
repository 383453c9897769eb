"""What a process computes on: devices, memory, scratch room, and how much is worked on at once.
Knows no model.
"""
