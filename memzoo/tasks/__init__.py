"""Data: pure, seeded generators and real corpora, served through grain."""
