"""Ways to an equilibrium beyond one iteration of the engine: Cayley map, Newton's method, and the ladder of them."""
