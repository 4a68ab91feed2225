"""Jobs in SQL: connections, tables and migrations, for SQLite and PostgreSQL."""
