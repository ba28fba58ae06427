//! Where a call came from that came by way of proxies.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::HeaderMap;
use ipnet::IpNet;

/// What proxies append the address to that they heard from: the older form of RFC 7239, `Forwarded`.
const FORWARDED_FOR: &str = "x-forwarded-for";

/// Proxies whose word is believed on whom they heard.
#[derive(Clone, Debug)]
pub struct TrustedProxies(Arc<[IpNet]>);

impl TrustedProxies {
    pub fn new(networks: &[IpNet]) -> Self {
        Self(networks.into())
    }

    /// The last address on a call's way to here that is not one of them, given the one that it came
    /// from at last. What is before that, anybody may have written.
    pub(super) fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut client = peer.to_canonical();
        if !self.trusts(client) {
            return client;
        }
        let lines: Vec<_> = headers.get_all(FORWARDED_FOR).into_iter().collect();
        let hops = lines.iter().rev().flat_map(|line| {
            let line = line.to_str().unwrap_or_default();
            line.rsplit(',').map(|hop| address(hop.trim()))
        });
        for hop in hops {
            // Of nonsense nobody can say who wrote it: the proxy that passed it on is the last known.
            let Some(hop) = hop else {
                break;
            };
            client = hop;
            if !self.trusts(client) {
                break;
            }
        }
        client
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }
}

/// Some proxies write the port too.
fn address(hop: &str) -> Option<IpAddr> {
    let with_port = || Some(hop.parse::<SocketAddr>().ok()?.ip());
    let address = hop.parse().ok().or_else(with_port);
    address.map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer: &str, lines: &[&str]) -> String {
        let networks = ["10.0.0.0/8", "127.0.0.1/32", "fd00::/8"];
        let networks = networks.map(|network| network.parse().expect("a network"));
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(FORWARDED_FOR, line.parse().expect("a value"));
        }
        let peer = peer.parse().expect("an address");
        TrustedProxies::new(&networks)
            .client(peer, &headers)
            .to_string()
    }

    #[test]
    fn the_last_that_is_no_proxy_is_the_client() {
        for (peer, lines, of) in [
            ("10.0.0.1", &["203.0.113.7"][..], "203.0.113.7"),
            ("::ffff:10.0.0.1", &["203.0.113.7"], "203.0.113.7"),
            ("10.0.0.1", &["1.1.1.1, 203.0.113.7"], "203.0.113.7"),
            ("10.0.0.1", &["1.1.1.1", "203.0.113.7"], "203.0.113.7"),
            (
                "10.0.0.1",
                &["1.1.1.1, 203.0.113.7,10.2.3.4"],
                "203.0.113.7",
            ),
            (
                "10.0.0.1",
                &["203.0.113.7", "10.2.3.4, fd00::1"],
                "203.0.113.7",
            ),
            ("fd00::1", &["203.0.113.7:4711"], "203.0.113.7"),
            ("fd00::1", &["[2001:db8::7]:4711"], "2001:db8::7"),
            ("fd00::1", &["::ffff:203.0.113.7"], "203.0.113.7"),
        ] {
            assert_eq!(client(peer, lines), of, "{peer} {lines:?}");
        }
    }

    #[test]
    fn nobody_else_is_believed() {
        for lines in [&["203.0.113.7"][..], &["10.0.0.1"], &[]] {
            assert_eq!(client("198.51.100.2", lines), "198.51.100.2");
        }
        // Nor what is behind nonsense, or what proxies say of each other alone.
        for (lines, of) in [
            (&[][..], "10.0.0.1"),
            (&[""], "10.0.0.1"),
            (&["unknown"], "10.0.0.1"),
            (&["203.0.113.7, unknown"], "10.0.0.1"),
            (&["203.0.113.7, unknown, 10.0.0.9"], "10.0.0.9"),
            (&["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ] {
            assert_eq!(client("10.0.0.1", lines), of, "{lines:?}");
        }
    }
}
