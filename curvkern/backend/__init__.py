"""How an op reaches silicon: registration with torch, choice of backend, native calls, argument errors."""
