"""The texts that training shows: read, varied, chosen."""
