"""How bytes move: collectives over the hierarchy of links."""
