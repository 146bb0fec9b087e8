"""Where Lightning lives: modules, data modules, callbacks and the run around them."""
