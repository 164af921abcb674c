"""What the user describes: frozen, validated, no physics."""
