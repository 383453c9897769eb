"""What lies on disk: files and their records, names in a run folder, storage, logical shards. No
torch at import.
"""
