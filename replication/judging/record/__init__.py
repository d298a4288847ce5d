"""After the lock: votes with their arms, counts, and the files of both."""
