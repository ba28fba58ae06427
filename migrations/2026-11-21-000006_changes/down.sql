DROP SEQUENCE change_revision;
