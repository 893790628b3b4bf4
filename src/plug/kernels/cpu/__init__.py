"""Products and decoding steps on a CPU, in C++ that is compiled once for the processor at hand."""
