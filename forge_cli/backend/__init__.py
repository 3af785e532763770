"""The one room that names TRL and TrainingArguments."""
