"""The two interventions: pure functions, and the callbacks that switch them on."""
