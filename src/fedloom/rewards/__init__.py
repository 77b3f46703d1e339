"""What is said of an answer that a model has generated: functions of prompt, answer and reference."""
