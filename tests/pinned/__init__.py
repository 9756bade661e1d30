"""Numbers that PEFT produced, for machines without torch, and the script that made them."""
