"""The page of all records, and the records as it reads them."""
