"""The page tried: hundreds of judges at once while the server is killed, and a classifier that guesses the arms."""
