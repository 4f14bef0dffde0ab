"""What a person types: a module for each verb, and the command line over them."""
