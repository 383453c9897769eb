"""What is said: the types of a job. Neither torch nor ray, and no I/O beyond reading the job
file.
"""
