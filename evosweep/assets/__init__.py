"""The cache folder, locks on what is in it, and files that are downloaded inside of Python wheels."""
