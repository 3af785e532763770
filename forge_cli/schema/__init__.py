"""What a run file may say: frozen pydantic sections, nothing else."""
