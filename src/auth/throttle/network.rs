//! Where somebody comes from, as far as it tells one person from another.

use std::net::{IpAddr, Ipv6Addr};

/// Who comes from around an address.
pub(super) fn from(address: IpAddr) -> String {
    format!("from {}", network(address))
}

/// What one person has of the addresses: of IPv6 a whole /64.
pub(in crate::auth) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let bits = address.to_bits() >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from_bits(bits))
        }
        address => address,
    }
}

/// The same as networks, in all forms that addresses of it may have been written down in.
pub(in crate::auth) fn networks(address: IpAddr) -> Vec<String> {
    match network(address) {
        IpAddr::V4(address) => vec![
            format!("{address}/32"),
            format!("{}/128", address.to_ipv6_mapped()),
        ],
        IpAddr::V6(network) => vec![format!("{network}/64")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_one_and_of_ipv6_a_network() {
        for (address, of) in [
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
            ("::1", "::"),
        ] {
            let address = network(address.parse().expect("an address"));
            assert_eq!(address.to_string(), of);
        }
    }

    #[test]
    fn an_address_is_looked_for_however_it_was_written_down() {
        for (address, in_networks) in [
            ("192.0.2.7", &["192.0.2.7/32", "::ffff:192.0.2.7/128"][..]),
            (
                "::ffff:192.0.2.7",
                &["192.0.2.7/32", "::ffff:192.0.2.7/128"],
            ),
            ("2001:db8:1:2:3:4:5:6", &["2001:db8:1:2::/64"]),
        ] {
            assert_eq!(networks(address.parse().expect("an address")), in_networks);
        }
    }
}
