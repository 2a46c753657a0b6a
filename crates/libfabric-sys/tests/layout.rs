//! The layout of every declared structure, as a C program printed it from libfabric's own headers (x86-64 Linux;
//! versions 1.17 and 2.6, which agree on everything here except the tail fields 2.6 adds).

#![cfg(target_pointer_width = "64")]

use std::mem::{offset_of, size_of};

use smddp_libfabric_sys::abi::*;

/// Structures declared only up to the last field used: theirs is larger.
macro_rules! prefix { ($($t:ty: $size:expr;)*) => { $(assert!(size_of::<$t>() <= $size, stringify!($t));)* } }
macro_rules! whole { ($($t:ty: $size:expr;)*) => { $(assert_eq!(size_of::<$t>(), $size, stringify!($t));)* } }
macro_rules! offsets {
    ($($t:ty { $($f:ident: $at:expr),* $(,)? })*) => { $($(assert_eq!(offset_of!($t, $f), $at, stringify!($t.$f));)*)* }
}
macro_rules! values { ($($c:ident: $v:expr;)*) => { $(assert_eq!($c as u64, $v, stringify!($c));)* } }

#[test]
fn sizes_are_the_headers() {
    whole! {
        fi_tx_attr: 80;
        fi_rx_attr: 64;
        fi_fabric_attr: 32;
        fi_info: 120;
        fi_link_attr: 40;
        fid_nic: 56;
        fid: 24;
        fid_fabric: 40;
        fid_domain: 40;
        fid_mr: 40;
        fi_mr_attr: 112;
        iovec: 16;
        fi_av_attr: 48;
        fid_av: 32;
        fi_cq_attr: 48;
        fi_cq_tagged_entry: 48;
        fi_cq_err_entry: 88;
        fid_cq: 32;
    }
    prefix! {
        fi_ep_attr: 104;
        fi_domain_attr: 232;
        fi_ops: 56;
        fi_ops_fabric: 56;
        fi_ops_domain: 104;
        fi_ops_mr: 32;
        fi_ops_av: 96;
        fi_ops_cq: 72;
        fi_ops_ep: 72;
        fi_ops_cm: 80;
        fi_ops_msg: 80;
        fi_ops_rma: 80;
        fi_ops_tagged: 80;
        fid_ep: 80;
    }
}

#[test]
fn offsets_are_the_headers() {
    offsets! {
        fi_tx_attr { caps: 0, mode: 8, op_flags: 16, msg_order: 24, comp_order: 32, inject_size: 40, size: 48, iov_limit: 56, rma_iov_limit: 64, tclass: 72 }
        fi_rx_attr { caps: 0, mode: 8, op_flags: 16, msg_order: 24, comp_order: 32, total_buffered_recv: 40, size: 48, iov_limit: 56 }
        fi_ep_attr { kind: 0, protocol: 4, protocol_version: 8, max_msg_size: 16 }
        fi_domain_attr { domain: 0, name: 8, threading: 16, control_progress: 20, data_progress: 24, resource_mgmt: 28, av_type: 32, mr_mode: 36, mr_key_size: 40, cq_data_size: 48 }
        fi_fabric_attr { fabric: 0, name: 8, prov_name: 16, prov_version: 24, api_version: 28 }
        fi_info { next: 0, caps: 8, mode: 16, addr_format: 24, src_addrlen: 32, dest_addrlen: 40, src_addr: 48, dest_addr: 56, handle: 64, tx_attr: 72, rx_attr: 80, ep_attr: 88, domain_attr: 96, fabric_attr: 104, nic: 112 }
        fi_link_attr { address: 0, mtu: 8, speed: 16, state: 24, network_type: 32 }
        fid_nic { fid: 0, device_attr: 24, bus_attr: 32, link_attr: 40, prov_attr: 48 }
        fi_ops { size: 0, close: 8, bind: 16, control: 24, ops_open: 32 }
        fid { fclass: 0, context: 8, ops: 16 }
        fi_ops_fabric { size: 0, domain: 8, passive_ep: 16, eq_open: 24, wait_open: 32, trywait: 40 }
        fid_fabric { fid: 0, ops: 24, api_version: 32 }
        fi_ops_domain { size: 0, av_open: 8, cq_open: 16, endpoint: 24 }
        fi_ops_mr { size: 0, reg: 8, regv: 16, regattr: 24 }
        fi_mr_attr { mr_iov: 0, iov_count: 8, access: 16, offset: 24, requested_key: 32, context: 40, auth_key_size: 48, auth_key: 56, iface: 64, device: 72 }
        fid_domain { fid: 0, ops: 24, mr: 32 }
        fid_mr { fid: 0, mem_desc: 24, key: 32 }
        fi_av_attr { kind: 0, rx_ctx_bits: 4, count: 8, ep_per_node: 16, name: 24, map_addr: 32, flags: 40 }
        fi_ops_av { size: 0, insert: 8 }
        fid_av { fid: 0, ops: 24 }
        fi_cq_attr { size: 0, flags: 8, format: 16, wait_obj: 20, signaling_vector: 24, wait_cond: 28, wait_set: 32, xpu_ctx: 40 }
        fi_cq_tagged_entry { op_context: 0, flags: 8, len: 16, buf: 24, data: 32, tag: 40 }
        fi_cq_err_entry { op_context: 0, flags: 8, len: 16, buf: 24, data: 32, tag: 40, olen: 48, err: 56, prov_errno: 60, err_data: 64, err_data_size: 72, src_addr: 80 }
        fi_ops_cq { size: 0, read: 8, readfrom: 16, readerr: 24, sread: 32, sreadfrom: 40, signal: 48, strerror: 56 }
        fid_cq { fid: 0, ops: 24 }
        fi_ops_ep { size: 0, cancel: 8, getopt: 16, setopt: 24 }
        fi_ops_cm { size: 0, setname: 8, getname: 16 }
        fi_ops_msg { size: 0, recv: 8, recvv: 16, recvmsg: 24, send: 32 }
        fi_ops_rma { size: 0, read: 8, readv: 16, readmsg: 24, write: 32, writev: 40, writemsg: 48, inject: 56, writedata: 64 }
        fi_ops_tagged { size: 0, recv: 8, recvv: 16, recvmsg: 24, send: 32 }
        fid_ep { fid: 0, ops: 24, cm: 32, msg: 40, rma: 48, tagged: 56 }
    }
}

#[test]
fn constants_are_the_headers() {
    values! {
        FI_ADDR_UNSPEC: 18446744073709551615;
        FI_MSG: 2;
        FI_RMA: 4;
        FI_TAGGED: 8;
        FI_READ: 256;
        FI_WRITE: 512;
        FI_RECV: 1024;
        FI_SEND: 2048;
        FI_REMOTE_READ: 4096;
        FI_REMOTE_WRITE: 8192;
        FI_REMOTE_CQ_DATA: 131072;
        FI_COMPLETION: 16777216;
        FI_TRANSMIT_COMPLETE: 134217728;
        FI_HMEM: 140737488355328;
        FI_REMOTE_COMM: 4503599627370496;
        FI_MR_LOCAL: 4;
        FI_MR_VIRT_ADDR: 16;
        FI_MR_ALLOCATED: 32;
        FI_MR_PROV_KEY: 64;
        FI_MR_HMEM: 1024;
        FI_HMEM_CUDA: 1;
        FI_AV_TABLE: 2;
        FI_EP_RDM: 3;
        FI_PROGRESS_MANUAL: 2;
        FI_THREAD_DOMAIN: 3;
        FI_RM_ENABLED: 2;
        FI_CQ_FORMAT_TAGGED: 4;
        FI_WAIT_NONE: 0;
        FI_WAIT_FD: 3;
        FI_GETWAIT: 5;
        FI_ENABLE: 6;
        FI_EAGAIN: 11;
        FI_ENODATA: 61;
        FI_ENOSYS: 38;
        FI_ECANCELED: 125;
        FI_ETRUNC: 265;
        FI_EAVAIL: 259;
    }
}
