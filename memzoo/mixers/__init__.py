"""One architecture per file: sequence in, sequence and state out."""
