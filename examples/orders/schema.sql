-- What the application keeps for itself.  No table has a unique constraint on the order: that nothing is recorded
-- twice is what the demo has to show, and nothing here would hide it.
CREATE SCHEMA shop;

CREATE TABLE shop.charge (
    charge_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id text NOT NULL,
    cents int NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE shop.refund (
    refund_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id text NOT NULL,
    cents int NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- +1: taken from the shelf; -1: put back.
CREATE TABLE shop.reservation (
    reservation_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id text NOT NULL,
    pieces int NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE shop.shipment (
    shipment_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id text NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
