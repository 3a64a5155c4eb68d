"""Papers whose two halves run on two machines."""
