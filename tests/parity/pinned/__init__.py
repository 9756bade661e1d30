"""Results of PEFT, for machines without torch, and the script that recorded them."""
