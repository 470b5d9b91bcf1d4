"""Where the loop over matrices runs. An engine takes jobs and a function and yields results as they come."""
