"""Who protects the bytes: the kernel, this process, or the engine, behind one interface (see ``interface``)."""
