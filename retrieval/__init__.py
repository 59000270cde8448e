"""What eval.py and infer.py are made of: extraction, the engine that speeds it up on a CPU, metrics, the export."""
