"""Fine-tuning: body and head trained together on augmented pixels."""
