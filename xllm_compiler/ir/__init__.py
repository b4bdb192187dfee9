"""The intermediate representation. Public names live in the modules; importing this package loads none of them."""
