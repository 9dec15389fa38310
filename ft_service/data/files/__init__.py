"""Readers for each kind of data file. `ft_service.data.read` chooses among them."""
