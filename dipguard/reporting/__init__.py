"""Tables, figures and logs. They read results and traces and compute nothing."""
