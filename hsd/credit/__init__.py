"""Per-token credit of rollouts under teacher contexts: export, figures and a page to look at."""
