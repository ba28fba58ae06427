-- Without leases nothing is leased.
UPDATE quota_balances SET leased = 0 WHERE leased <> 0;
DROP TABLE quota_settlements;
DROP TABLE quota_leases;
DROP TABLE replicas;
