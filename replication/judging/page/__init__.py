"""The page on which people vote, and the administrator's: FastAPI over the store."""
