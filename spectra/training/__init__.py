"""Fine-tune, measure what was learnt and what was forgotten, and repeat it over a grid."""
