"""PEFT's AdaLoRA and ours, trained side by side on the same model, weights and batches."""
