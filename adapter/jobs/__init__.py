"""Jobs: kept in the database, driven through the engine, waited for and cancelled."""
